"""A synthetic PASCAL-Part: drawn horses and cows with true parts."""
