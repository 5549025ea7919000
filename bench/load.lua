-- For wrk: POST bodies in turn, and compare every answer with those known to be right.
-- Arguments: content type, file of bodies, file of right answers. A file is a sequence of "<length>\n<bytes>".

local threads = {}

local function read(path)
  local file, items = assert(io.open(path, "rb")), {}
  local length = file:read("*n")
  while length do
    file:read(1) -- the line's end
    items[#items + 1] = file:read(length)
    length = file:read("*n")
  end
  file:close()
  return items
end

function setup(thread)
  threads[#threads + 1] = thread
end

-- From here to `done` this runs in wrk's thread, whose globals `done` asks for.
function init(args)
  local content_type, bodies, answers = args[1], read(args[2]), read(args[3])
  requests, right, wrong, example, next_request = {}, {}, 0, "", 0
  for i, body in ipairs(bodies) do
    requests[i] = wrk.format("POST", nil, { ["Content-Type"] = content_type }, body)
  end
  for _, answer in ipairs(answers) do
    right[answer] = true
  end
end

function request()
  next_request = next_request % #requests + 1
  return requests[next_request]
end

function response(status, _, body)
  if status ~= 200 or not right[body] then
    wrong = wrong + 1
    if example == "" then
      example = status .. " " .. body:sub(1, 200)
    end
  end
end

-- The last line of output: requests, microseconds, median and 99th percentile of latency in microseconds, failures of
-- transport, wrong answers, and the first of these.
function done(summary, latency, _)
  local errors, wrong, example = summary.errors, 0, ""
  for _, thread in ipairs(threads) do
    wrong = wrong + thread:get("wrong")
    example = example .. thread:get("example")
  end
  local failures = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format("%d %d %d %d %d %d %s\n", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), failures, wrong, example:gsub("%s+", " ")))
end
