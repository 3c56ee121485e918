"""The commands of rooms that lie low in the house: `python -m mljax.data` and `python -m mljax.weights`."""
