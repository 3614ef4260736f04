"""What `octavo plan` knows: sizes, stored formats, accelerators, a roofline. Nothing here imports torch: a plan is quick."""
