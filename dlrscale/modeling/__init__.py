"""What an exported folder carries: torch and transformers only, no import of dlrscale."""
