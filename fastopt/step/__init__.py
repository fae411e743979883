"""A step: its options, the table of hyperparameters, and the rows that row-wise steps leave behind."""
