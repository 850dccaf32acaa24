"""What turns a trained model into one that a server loads."""
