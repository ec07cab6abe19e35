.DEFAULT_GOAL := help
help:
	@echo soon
