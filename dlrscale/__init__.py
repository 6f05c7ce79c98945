"""dlrscale: what a fine-tuning lock on open weights really costs an attacker."""

__version__ = "0.1.0"
