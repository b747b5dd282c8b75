"""What is stored of conversations, for people: what a server says, and how it is shown."""
