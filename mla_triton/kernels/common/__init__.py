"""Device functions, the schedule kernel and the launch path that all architectures share."""
