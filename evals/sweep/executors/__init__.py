"""Who does the work of a sweep: this process, several started by a launcher, or a Ray cluster. One way a file."""
