"""Tables (`reports.tables`) and pictures (`reports.plots`) of what runs measured."""
