"""Other runtimes, a file each."""
