"""Published studies: their findings as data, and the section that answers them."""
