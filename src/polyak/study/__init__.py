"""What an average is worth: metrics, flatness, planes."""
