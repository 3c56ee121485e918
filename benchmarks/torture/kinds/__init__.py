"""The kinds of torture, one file each; `KIND` of each file is its plan and what a case does."""
