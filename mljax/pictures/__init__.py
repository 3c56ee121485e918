"""Everything that makes a picture: attention over photos, sheets of photos, plots."""
