"""What the window knows: the open project, the form, the dataset, plans, drawings. No widgets."""
