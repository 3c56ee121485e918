"""Systems, one file per paper: how a batch becomes outputs and a loss."""
