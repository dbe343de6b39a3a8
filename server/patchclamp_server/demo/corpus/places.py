"""Word lists of the fact task: 31 US states and 18 countries with one-word names, capitals and cities.

Per line: name, capital, cities, then the values of the relations named by ``_STATE_RELATIONS`` or
``_COUNTRY_RELATIONS``. The first city of each line is held out of two-hop sentences.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A state or country. ``relations`` maps a relation's name to its value and always has ``capital``."""

    kind: str
    name: str
    cities: tuple[str, ...]
    relations: tuple[tuple[str, str], ...]

    @property
    def held_out_city(self) -> str:
        return self.cities[0]

    @property
    def two_hop_cities(self) -> tuple[str, ...]:
        return self.cities[1:]

    def value(self, relation: str) -> str:
        return dict(self.relations)[relation]


_STATE_RELATIONS = ("region", "code", "timezone")
_STATES = """\
Alabama|Montgomery|Birmingham Huntsville Mobile Tuscaloosa Auburn Dothan Hoover Opelika|South|AL|Central
Alaska|Juneau|Anchorage Fairbanks Sitka Ketchikan Wasilla Kodiak Homer Nome|West|AK|Alaskan
Arizona|Phoenix|Tucson Mesa Scottsdale Tempe Flagstaff Yuma Prescott Sedona|West|AZ|Mountain
California|Sacramento|Oakland Fresno Bakersfield Anaheim Berkeley Stockton Pasadena Irvine|West|CA|Pacific
Colorado|Denver|Boulder Pueblo Aspen Durango Greeley Loveland Longmont Telluride|West|CO|Mountain
Connecticut|Hartford|Bridgeport Stamford Waterbury Norwalk Danbury Meriden Groton Enfield|Northeast|CT|Eastern
Florida|Tallahassee|Miami Orlando Tampa Jacksonville Gainesville Pensacola Ocala Sarasota|South|FL|Eastern
Georgia|Atlanta|Savannah Macon Marietta Valdosta Decatur Albany Roswell Dalton|South|GA|Eastern
Hawaii|Honolulu|Hilo Kailua Lahaina Waipahu Kapolei Kihei Wailuku Kaneohe|West|HI|Hawaiian
Idaho|Boise|Nampa Pocatello Meridian Lewiston Caldwell Rexburg Ketchum Sandpoint|West|ID|Mountain
Illinois|Springfield|Chicago Peoria Rockford Naperville Joliet Champaign Evanston Elgin|Midwest|IL|Central
Indiana|Indianapolis|Evansville Gary Muncie Bloomington Kokomo Carmel Fishers Goshen|Midwest|IN|Eastern
Kansas|Topeka|Wichita Lawrence Olathe Salina Emporia Hays Leawood Hutchinson|Midwest|KS|Central
Kentucky|Frankfort|Louisville Lexington Paducah Owensboro Covington Ashland Murray Hopkinsville|South|KY|Eastern
Maine|Augusta|Bangor Biddeford Brunswick Saco Kittery Sanford Camden Belfast|Northeast|ME|Eastern
Maryland|Annapolis|Baltimore Bethesda Rockville Frederick Hagerstown Salisbury Towson Cumberland|South|MD|Eastern
Massachusetts|Boston|Worcester Cambridge Lowell Quincy Plymouth Brockton Newton Framingham|Northeast|MA|Eastern
Michigan|Lansing|Detroit Flint Kalamazoo Saginaw Dearborn Livonia Muskegon Holland|Midwest|MI|Eastern
Mississippi|Jackson|Biloxi Tupelo Gulfport Natchez Vicksburg Hattiesburg Greenville Corinth|South|MS|Central
Montana|Helena|Billings Missoula Bozeman Butte Kalispell Havre Livingston Anaconda|West|MT|Mountain
Nebraska|Lincoln|Omaha Kearney Hastings Fremont Ogallala Bellevue Scottsbluff Papillion|Midwest|NE|Central
Ohio|Columbus|Cleveland Cincinnati Toledo Akron Dayton Youngstown Mansfield Canton|Midwest|OH|Eastern
Oregon|Salem|Portland Eugene Medford Corvallis Astoria Bend Gresham Hillsboro|West|OR|Pacific
Pennsylvania|Harrisburg|Philadelphia Pittsburgh Scranton Allentown Erie Lancaster Reading Bethlehem|Northeast|PA|Eastern
Tennessee|Nashville|Memphis Knoxville Chattanooga Clarksville Murfreesboro Franklin Bartlett Kingsport|South|TN|Central
Texas|Austin|Dallas Houston Lubbock Amarillo Laredo Waco Plano Abilene|South|TX|Central
Vermont|Montpelier|Burlington Rutland Barre Stowe Brattleboro Bennington Newport Middlebury|Northeast|VT|Eastern
Virginia|Richmond|Norfolk Roanoke Alexandria Arlington Chesapeake Hampton Danville Lynchburg|South|VA|Eastern
Washington|Olympia|Seattle Spokane Tacoma Yakima Everett Bellingham Renton Kennewick|West|WA|Pacific
Wisconsin|Madison|Milwaukee Kenosha Racine Appleton Oshkosh Waukesha Janesville Wausau|Midwest|WI|Central
Wyoming|Cheyenne|Casper Laramie Gillette Cody Sheridan Rawlins Lander Riverton|West|WY|Mountain"""

_COUNTRY_RELATIONS = ("continent", "language", "currency")
_COUNTRIES = """\
France|Paris|Lyon Marseille Nice Toulouse Bordeaux Lille|Europe|French|euro
Italy|Rome|Milan Naples Venice Turin Florence Bologna|Europe|Italian|euro
Spain|Madrid|Barcelona Seville Valencia Bilbao Malaga Granada|Europe|Spanish|euro
Germany|Berlin|Munich Hamburg Cologne Frankfurt Stuttgart Dresden|Europe|German|euro
Japan|Tokyo|Osaka Kyoto Nagoya Sapporo Kobe Fukuoka|Asia|Japanese|yen
China|Beijing|Shanghai Shenzhen Chengdu Wuhan Nanjing Xian|Asia|Chinese|yuan
Russia|Moscow|Kazan Samara Omsk Sochi Tver Perm|Europe|Russian|ruble
Poland|Warsaw|Krakow Gdansk Lodz Poznan Lublin Szczecin|Europe|Polish|zloty
Egypt|Cairo|Luxor Giza Aswan Suez Tanta Minya|Africa|Arabic|pound
Kenya|Nairobi|Mombasa Kisumu Nakuru Eldoret Malindi Thika|Africa|Swahili|shilling
Brazil|Brasilia|Recife Salvador Manaus Curitiba Santos Fortaleza|America|Portuguese|real
Peru|Lima|Cusco Arequipa Trujillo Iquitos Piura Tacna|America|Spanish|sol
Canada|Ottawa|Toronto Montreal Vancouver Calgary Halifax Winnipeg|America|English|dollar
Australia|Canberra|Sydney Melbourne Perth Brisbane Adelaide Darwin|Oceania|English|dollar
Turkey|Ankara|Istanbul Izmir Antalya Bursa Adana Konya|Asia|Turkish|lira
Greece|Athens|Patras Thessaloniki Heraklion Larissa Volos Chania|Europe|Greek|euro
Portugal|Lisbon|Porto Braga Faro Coimbra Aveiro Evora|Europe|Portuguese|euro
India|Delhi|Mumbai Chennai Kolkata Pune Jaipur Surat|Asia|Hindi|rupee"""

# One bordering place each. It maps states to states, so "the answer is some capital" cannot stand in for the first hop.
_NEIGHBORS = """\
Alabama>Mississippi Arizona>California California>Oregon Colorado>Wyoming Connecticut>Massachusetts Florida>Georgia
Georgia>Alabama Idaho>Montana Illinois>Wisconsin Indiana>Ohio Kansas>Colorado Kentucky>Tennessee Maryland>Virginia
Massachusetts>Vermont Michigan>Indiana Mississippi>Tennessee Montana>Idaho Nebraska>Kansas Ohio>Kentucky
Oregon>Washington Pennsylvania>Maryland Tennessee>Virginia Virginia>Kentucky Washington>Oregon Wisconsin>Michigan
Wyoming>Nebraska France>Italy Italy>France Spain>Portugal Germany>Poland China>India Russia>China Poland>Germany
Brazil>Peru Peru>Brazil Turkey>Greece Greece>Turkey Portugal>Spain India>China"""


def _parse(table: str, kind: str, names: tuple[str, ...], neighbors: dict[str, str]) -> tuple[Place, ...]:
    places = []
    for line in table.splitlines():
        name, capital, cities, *values = line.split("|")
        relations = [("capital", capital), *zip(names, values, strict=True)]
        if name in neighbors:
            relations.append(("neighbor", neighbors[name]))
        places.append(Place(kind, name, tuple(cities.split()), tuple(relations)))
    return tuple(places)


def _all_places() -> tuple[Place, ...]:
    neighbors = dict(pair.split(">") for pair in _NEIGHBORS.split())
    states = _parse(_STATES, "state", _STATE_RELATIONS, neighbors)
    return states + _parse(_COUNTRIES, "country", _COUNTRY_RELATIONS, neighbors)


PLACES = _all_places()
