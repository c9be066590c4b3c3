"""Models: which parameter is what (anatomy), the GPT to read and pretrain (gpt), pretrained ones (loading), and the bundle."""
