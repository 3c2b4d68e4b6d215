"""A GPT trained by tuned DDP and by DeAR over a slow network, compared."""
