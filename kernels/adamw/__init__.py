"""AdamW's update of one parameter."""
