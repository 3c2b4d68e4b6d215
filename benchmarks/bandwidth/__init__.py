"""The bandwidth a strategy needs to stay close to its compute floor."""
