"""One HTML page about a family: its sizes, their quality and cost, its training and where it comes from."""

from poa.deploy.report.page import Subject, render, write_page
from poa.deploy.report.pictures import Pictures, PicturesConfig, pictures_of
from poa.deploy.report.points import Points, points_of

__all__ = ["Pictures", "PicturesConfig", "Points", "Subject", "pictures_of", "points_of", "render", "write_page"]
