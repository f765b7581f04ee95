"""From recipe to published checkpoint: plan, calibrate, requantize, run."""
