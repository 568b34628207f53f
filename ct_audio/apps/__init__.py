"""What people open in a browser: the listening page and the playground."""
