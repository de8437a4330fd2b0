"""One file a tab, each with a class that is a `Tab` of gui/state/app_state.py."""
