"""Every limit of the dataset doctor, with its source.

Measured with benchmarks/dataset_doctor.py on 84 emoji of 64 px (assets/) and 534 preview images of ComfyUI's templates,
most of 350 px: photos, drawings and screens (benchmarks/results/dataset_doctor.json). "Clean" are the images as they are;
the others were made from them.
"""

from __future__ import annotations

# Detail: contrast of the finest octave, relative to the stronger of the next two. Of natural images each octave has
# about the same contrast (Field 1987, J. Opt. Soc. Am. A 4). Called blurry: 0 of 618 clean images, 600 of those enlarged
# twice, 617 of those enlarged four times, 556 with a Gaussian blur of 1 px, 617 with one of 1.5 px. Enlarged 1.5 times: 10.
BLURRY = 0.17
FLAT_LEVELS = 0.5  # of 255: contrast of the octaves below which an image has nothing to judge

# Brightness, in levels of 255. The percentiles leave out a small light or a white background around a drawing.
# Clean emoji: the 99th percentile is at least 106, the 1st at most 181, and their distance at least 74. Of the previews,
# one black image is below.
DARK_LEVEL = 64  # the 99th percentile is below it: nearly everything is black
BRIGHT_LEVEL = 200  # the 1st percentile is above it: nearly everything is white
FLAT_RANGE = 40  # distance of both percentiles: gray without contrast

ENLARGED = 1.0  # more than this factor
TINY = 2.0  # at least this factor: three of four pixels are made up

# Copies: bits of 63 that differ in the hash of the low frequencies (Zauner 2010, "Implementation and Benchmarking of
# Perceptual Image Hash Functions", DCT hash), and correlation of the images at 16 x 16 pixels. JPEG at quality 30: 616 of
# 618 are found; half the size, 15 % brighter, 20 % more contrast, 30 % less color, mirrored: all; 3 % cropped on each
# side: 562. Clean: 0 of 1,918 pairs of emoji; 9 images of the previews, which all show one picture twice.
SAME_HASH_BITS = 10
SAME_CORRELATION = 0.85

# Marks: cosine between the gradients of two images in one place, the share of images that agree, and how far the mark
# has edges of all directions (ratio of the eigenvalues of its structure tensor): a border or an outline has not. Clean
# emoji: outlines that agree, up to 14 of 56, have at most 0.06, but for 4 round faces of 28; text of any opacity has at
# least 0.45.
SAME_GRADIENT = 0.5
MARK_SHARE = 0.12
MARK_IMAGES = 5  # at least
MARK_DIRECTIONS = 0.2

# Losses of a run: robust standard deviations above the median (Iglewicz and Hoaglin 1993, "How to Detect and Handle
# Outliers", modified z-score), and the images that are needed to have a spread.
LOSS_OUTLIER = 3.5
LEAST_LOSSES = 8
