"""A comparison of methods at many targets and seeds, as units that may be killed and continued."""
