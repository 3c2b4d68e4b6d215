"""Memory of a worker: at its peak, and once training runs steadily."""
