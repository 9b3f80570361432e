"""Stand-ins for libraries that need hardware which is not there."""
