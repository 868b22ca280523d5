-- Admits rollouts: each once, within the byte budget, all records of the call or none for lack of room.
-- The body of each was set at raw:<record id> just before, in the same transaction or with an expiry: it is linked
-- to body:<record id> when its record is admitted and let go when not, and never passes through here.
-- KEYS[3]  segments     stream  group `matcher`: kind, schema_version, record_id, policy_version, bytes, line
-- KEYS[4]  seen:now     set     record ids of the current generation
-- KEYS[5]  seen:before  set     record ids of the generation before it
-- ARGV[2]  byte budget of the run: bodies with their lines, payloads, results, and the log beyond its share
-- ARGV[3]  ids a generation of `seen` holds: at least so many of the latest are recognised
-- ARGV[4]  largest body, bytes
-- ARGV[5]  number of records, then the line of each, from ARGV[6]:
--          record id \t policy version \t request id or nothing \t tokens \t task \t sample id
--          \t generated_at_ms \t purpose \t optimizer step; it goes into the log as it is
-- Reply: {"full", bytes in use}, or one text with a status a record, parted by " ":
--   ok         admitted
--   duplicate  admitted before
--   late       its request was closed without it
--   too_large  over the largest body
--   no_body    nothing at raw:<record id>
--   bad_id     line not as above (numbers of 15 digits at most, task and sample id 800 bytes, purpose train or
--              evaluation), record or request id not 1 to 200 characters of A-Z a-z 0-9 . _ : ~ -, or a
--              record its open request did not ask for, or not for that purpose
local num, limit = tonumber(ARGV[5]), tonumber(ARGV[4])
local RAW, BODY, PAYLOAD = PREFIX .. 'raw:', PREFIX .. 'body:', PREFIX .. 'payload:'

local LINE =
  '^([%w._:~-]+)\t(%d+)\t([%w._:~-]*)\t(%d+)\t([^\t\n]*)\t([^\t\n]*)\t(%d+)\t([^\t\n]*)\t(%-?%d+)$'
local function read_line(line)
  local id, version, request, tokens, task, sample, at, purpose, step = string.match(line, LINE)
  local fits = id and #id <= 200 and #request <= 200 and #task <= 800 and #sample <= 800
    and (purpose == 'train' or purpose == 'evaluation')
    and #version < 16 and #tokens < 16 and #at < 16 and #step < 17
  if fits then return id, version, request, purpose end
  return ''
end

-- some looks for all ids, instead of some for every record
local ids, versions, asked_by, sizes, seen, named, lanes = {}, {}, {}, {}, {}, {}, {}
for i = 1, num do
  local purpose
  ids[i], versions[i], asked_by[i], purpose = read_line(ARGV[5 + i])
  lanes[i] = lane_of(purpose)
  if ids[i] ~= '' then named[#named + 1] = ids[i] end
end
for _, key in ipairs({KEYS[4], KEYS[5]}) do
  in_chunks(named, function(chunk)
    for i, known in ipairs(redis.call('SMISMEMBER', key, unpack(chunk))) do
      if known == 1 then seen[chunk[i]] = true end
    end
  end)
end
-- an id that `seen` has forgotten while its rollout still waits would take that one's place
for _, start in ipairs({BODY, PAYLOAD}) do
  in_chunks(named, function(chunk)
    local keys = {}
    for i, id in ipairs(chunk) do keys[i] = start .. id end
    if redis.call('EXISTS', unpack(keys)) == 0 then return end
    for i, id in ipairs(chunk) do seen[id] = seen[id] or redis.call('EXISTS', keys[i]) == 1 end
  end)
end
local requests = {}
local function open_request(id)
  if requests[id] == nil then
    local found = redis.call('HMGET', PREFIX .. 'request:' .. id, 'records', 'purpose')
    requests[id] = found[1] and {records = ' ' .. found[1] .. ' ', lane = lane_of(found[2]), came = 0} or false
  end
  return requests[id]
end

local status, admitted, fresh, unwanted = {}, {}, {}, {}
local repeated, late, bytes = 0, 0, 0
for i = 1, num do
  local id, request = ids[i], asked_by[i]
  local size = id ~= '' and redis.call('STRLEN', RAW .. id) or 0
  if id == '' then
    status[i] = 'bad_id'
  elseif size > limit then
    status[i] = 'too_large'
  elseif seen[id] then
    status[i], repeated = 'duplicate', repeated + 1
  elseif request ~= '' and not open_request(request) then
    status[i], late = 'late', late + 1
  elseif request ~= '' and not string.find(open_request(request).records, ' ' .. id .. ' ', 1, true) then
    status[i] = 'bad_id'
  elseif request ~= '' and open_request(request).lane ~= lanes[i] then
    status[i] = 'bad_id'
  elseif size == 0 and redis.call('EXISTS', RAW .. id) == 0 then
    status[i] = 'no_body'
  else
    if request ~= '' then requests[request].came = requests[request].came + 1 end
    size = size + #ARGV[5 + i] -- its line lies in the stream
    seen[id], status[i], sizes[i] = true, 'ok', size
    admitted[#admitted + 1], fresh[#fresh + 1] = i, id
    bytes = bytes + size
  end
  if id ~= '' and status[i] ~= 'ok' then unwanted[#unwanted + 1] = RAW .. id end
end

local budget, known = tonumber(ARGV[2]), redis.call('HMGET', COUNTERS, 'bytes', 'log_bytes', 'budget')
local used = tonumber(known[1] or '0') + math.max(0, tonumber(known[2] or '0') - budget / LOG_SHARE)
if bytes > 0 and used + bytes > budget then
  for _, id in ipairs(fresh) do unwanted[#unwanted + 1] = RAW .. id end
  in_chunks(unwanted, function(chunk) redis.call('UNLINK', unpack(chunk)) end)
  return {'full', used}
end

-- first of all writes: it is refused at the server's own limit, and then nothing is changed
in_chunks(fresh, function(chunk) redis.call('SADD', KEYS[4], unpack(chunk)) end)
local lines, entries = {}, {}
for n, i in ipairs(admitted) do
  local id = ids[i]
  redis.call('RENAME', RAW .. id, BODY .. id)
  redis.call('PERSIST', BODY .. id)
  entries[n] = redis.call('XADD', KEYS[3], '*', 'kind', 'segment', 'schema_version', '2', 'record_id', id,
    'policy_version', versions[i], 'bytes', sizes[i], 'line', ARGV[5 + i])
  lines[n] = ARGV[5 + i]
end
in_chunks(entries, function(chunk) redis.call('SADD', PREFIX .. 'admitted', unpack(chunk)) end)
in_chunks(unwanted, function(chunk) redis.call('UNLINK', unpack(chunk)) end)
for id, request in pairs(requests) do
  if request and request.came > 0 then
    local left = redis.call('HINCRBY', PREFIX .. 'request:' .. id, 'remaining', -request.came)
    if left <= 0 then close_request(id) end
    count(request.lane .. 'open_records', -request.came)
  end
end
if #lines > 0 then emit('pushed', 'records', table.concat(lines, '\n')) end
if known[3] ~= ARGV[2] then redis.call('HSET', COUNTERS, 'budget', ARGV[2]) end
if redis.call('SCARD', KEYS[4]) >= tonumber(ARGV[3]) then redis.call('RENAME', KEYS[4], KEYS[5]) end
local to_evaluate = 0
for _, i in ipairs(admitted) do
  if lanes[i] ~= '' then to_evaluate = to_evaluate + 1 end
end
count('pushed', #lines - to_evaluate)
count('evaluation_pushed', to_evaluate)
count('evaluation_waiting', to_evaluate)
count('duplicates', repeated)
count('late', late)
count('bytes', bytes)
return table.concat(status, ' ')
