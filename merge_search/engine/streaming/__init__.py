"""One merge from files to files, in little memory."""
