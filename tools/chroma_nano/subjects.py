"""The 200 subjects that the base is trained to draw well, and that the yardstick names. See classifier.py."""

from __future__ import annotations

from collections.abc import Sequence

from .pictures import Emoji

FACES = """grinning face, face with tears of joy, smiling face with sunglasses, smiling face with heart shaped eyes, crying face,
angry face, sleeping face, nerd face, astonished face, clown face, robot face, ghost, extraterrestrial alien, skull, jack o lantern"""
ANIMALS = """cat face, dog face, mouse face, cow face, rabbit face, horse face, pig face, wolf face, bear face, panda face,
lion face, unicorn face, fox face, tiger face, frog face, dragon face, koala, monkey, elephant, giraffe face, zebra face, gorilla,
hedgehog, rooster, chicken, hatching chick, penguin, duck, owl, parrot, swan, flamingo, turtle, snake, crocodile,
spouting whale, octopus, fish, tropical fish, shark, lobster, jellyfish, snail, bug, honeybee, lady beetle, spider, butterfly, bat"""
PLANTS = """cactus, palm tree, evergreen tree, deciduous tree, four leaf clover, maple leaf, potted plant, tulip, cherry blossom, rose,
hibiscus, sunflower, brown mushroom, christmas tree"""
FOOD = """tomato, watermelon, tangerine, lemon, banana, pineapple, red apple, green apple, pear, peach, cherries, strawberry,
kiwifruit, avocado, aubergine, broccoli, hot pepper, ear of maize, hamburger, slice of pizza, french fries, hot dog, taco, bread,
croissant, egg, pancakes, cheese wedge, popcorn, sushi, rice ball, doughnut, cookie, candy, lollipop, ice cream, birthday cake,
cupcake, wine glass, cocktail glass, beer mug, hot beverage"""
TRAVEL = """automobile, taxi, police car, bus, fire engine, delivery truck, tractor, bicycle, motor scooter, steam locomotive,
airplane, helicopter, flying saucer, ship, anchor, house building, european castle, church, tent, volcano, mount fuji, rainbow,
sun with face, glowing star, medium star, crescent moon, cloud, umbrella, snowman, fire, droplet, earth globe americas"""
ACTIVITIES = """soccer ball, basketball and hoop, american football, tennis racquet and ball, trophy, wrapped present, balloon,
teddy bear, guitar, violin, trumpet, artist palette, direct hit, video game"""
OBJECTS = """electric light bulb, camera, television, radio, microphone, headphone, mobile phone, telephone, open book, scissors,
key, lock, hammer, axe, bomb, bell, money bag, gem stone, ring, crown, jeans, dress, athletic shoe, envelope, candle, chair"""
HEARTS = "heart, blue heart, green heart, yellow heart, purple heart, broken heart, heart with arrow, kiss mark"
NAMES = tuple(
    name.strip()
    for names in (FACES, ANIMALS, PLANTS, FOOD, TRAVEL, ACTIVITIES, OBJECTS, HEARTS)
    for name in names.replace("\n", " ").split(",")
)


def subjects(emoji: Sequence[Emoji]) -> list[Emoji]:
    """The emoji of NAMES, in that order. Of two of one name, that whose short name is the same: the red heart.

    Raises:
        KeyError: one of them is not among the emoji.
    """
    by_name = {e.name: e for e in sorted(emoji, key=lambda e: e.name == e.short)}
    return [by_name[name] for name in NAMES]
