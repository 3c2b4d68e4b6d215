"""What attaching costs where there is nothing to gain: on a single rank."""
