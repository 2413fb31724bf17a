"""How good a model is: likelihoods of pictures it did not make."""
