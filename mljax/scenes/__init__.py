"""The drawn world of the embedded data set; `mljax.data.scenes` is its reader."""
