"""Models of other families of transformers as models of this one, and back."""
