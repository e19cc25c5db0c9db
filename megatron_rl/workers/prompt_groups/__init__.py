"""Groups of prompts on their way from the loader to training, and the laws that move them."""
