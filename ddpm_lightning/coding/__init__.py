"""A progressive codec of a trained model (Ho et al. 2020, section 4.3, Algorithms 3 and 4)."""
