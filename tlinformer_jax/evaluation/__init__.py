"""What a trained model is worth: by position, at other lengths, on any text."""
