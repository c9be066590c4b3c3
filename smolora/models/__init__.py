"""Models: which parameter is what (anatomy), the GPT to read (gpt), pretrained ones (loading), and the bundle."""
