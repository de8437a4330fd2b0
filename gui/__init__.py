"""The window: a Gradio app on loopback. `tabs` are its pages, `widgets` pure functions from data to
HTML, `state` what all pages share; the modules here start it, guard it and route its requests."""
