"""Results to Markdown and to one HTML file."""
