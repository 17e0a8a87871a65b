"""The networks. They know nothing of noise schedules, files or devices."""
