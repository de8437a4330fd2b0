"""What is wrong with a folder of images before a training, as findings with what mends them."""
