"""When to measure, and the Lightning shell around each instrument."""
