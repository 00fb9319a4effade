"""The data path beside others: rates, costs, shuffles, and what a restart or a defect does."""
