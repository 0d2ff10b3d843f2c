"""Code that every other package uses: errors, messages, files, memory limits, pixel ranges."""
