"""Names of needles: common nouns of 3 to 9 letters, that a magic number can belong to."""

_WORDS = """
    acorn almond anchor apple apron arrow attic autumn badge baker balcony barley barn barrel basin basket beacon bell
    bench blanket blossom boat bonnet book bottle bowl branch bread brick bridge brook broom bucket button cabin candle
    canoe canvas carpet carriage cart castle cave cedar cellar chair chapel cherry chest chimney church circle clay
    cliff cloak clock cloud coach coast coffee collar column compass copper corner cottage cotton cradle crown cup
    curtain daisy dawn deer desert desk diamond dinner doctor donkey door dove dragon drawer dress drum eagle engine
    falcon farm feather fence ferry fiddle field finger flag flame flute forest fork fountain fox garden garland gate
    ghost glass glove goat grain grape hammer harbour harp harvest hat hawk hedge helmet heron hill honey horse hotel
    house inn iron island ivory jacket jewel jug kettle key kitchen kite knife ladder lake lamp lantern leaf lemon
    letter lily lion loom mantle maple marble market mast meadow medal melon mill mirror monk moon mountain mouse needle
    nest oak oar ocean olive onion orchard organ otter oven owl paddle palace paper parlour pearl pebble pencil piano
    pillow pipe plough pocket pond poppy prison quarry queen quill rabbit raven ribbon ring river road robin rocket roof
    room rope rose saddle sailor sandal school shadow sheep shell ship shoe silver sparrow spoon stable star station
    statue stone stove stream street summer sword table tailor temple theatre thistle thread throne tiger tower train
    trumpet tulip tunnel turtle valley velvet village violin wagon wall walnut watch water wheat wheel willow window
    winter wolf wool
"""
NOUNS = tuple(_WORDS.split())
