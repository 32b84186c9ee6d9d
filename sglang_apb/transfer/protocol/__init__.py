"""What both servers say to each other, and must agree on: frames and their bounds, keys, page ranges, options."""
