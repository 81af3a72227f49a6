using System.Buffers;
using System.Buffers.Binary;
using System.Text.Json;
using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>The <c>migration</c> capability.</summary>
/// <param name="PageSizeBytes">Page size of v1 dirty bitmaps, or null when not told.</param>
/// <param name="MaxBitmapBytes">Longest v1 dirty bitmap.</param>
internal sealed record VfioUserMigrationCapability(ulong? PageSizeBytes, ulong MaxBitmapBytes = VfioUserLimits.BitmapBytes);

/// <summary>The <c>twin_socket</c> capability.</summary>
/// <param name="Supported">In a request: wanted. In a reply: granted.</param>
/// <param name="FdIndex">In a reply that grants it: index of the socket among the reply's descriptors.</param>
internal sealed record VfioUserTwinSocket(bool Supported, int? FdIndex = null);

/// <summary>
/// Payload of VERSION, request and reply: <c>u16 major, u16 minor</c>, then optional UTF-8 JSON <c>{"capabilities":{...}}</c> with a NUL that
/// counts (vfio-user 2). Absent members have their defaults, unknown ones are ignored, and known ones must have the right type and keep their limits.
/// </summary>
internal sealed record VfioUserVersion
{
    internal const int HeadBytes = 4;
    internal const ushort OurMinor = 2;

    internal ushort Major { get; init; }
    internal ushort Minor { get; init; } = OurMinor;
    /// <summary>Whether there was JSON at all.</summary>
    internal bool HasJson { get; init; } = true;
    /// <summary>Descriptors that the sender can receive with one message.</summary>
    internal int MaxMsgFds { get; init; } = 1;
    /// <summary>Largest count in data messages towards the sender.</summary>
    internal int MaxDataXferBytes { get; init; } = VfioUserLimits.DataXferBytes;
    /// <summary>DMA page sizes, combined by OR.</summary>
    internal ulong PageSizes { get; init; } = VfioUserLimits.PageBytes;
    internal int MaxDmaMaps { get; init; } = VfioUserLimits.DmaMaps;
    internal VfioUserMigrationCapability? Migration { get; init; }
    internal VfioUserTwinSocket? TwinSocket { get; init; }
    /// <summary>REGION_WRITE_MULTI is understood.</summary>
    internal bool WriteMultiple { get; init; }

    /// <summary>What this project's client proposes (vfio-user C-5): QEMU's figures and a twin socket.</summary>
    internal static VfioUserVersion ClientProposal => new()
    {
        MaxMsgFds = VfioUserLimits.MessageFds,
        Migration = new VfioUserMigrationCapability(VfioUserLimits.PageBytes),
        TwinSocket = new VfioUserTwinSocket(true),
    };

    /// <summary>Parses a payload. Does not check the major number: for a wrong one the server answers EINVAL, and the client disconnects.</summary>
    /// <param name="payload">Message without its header.</param>
    /// <returns>The content.</returns>
    /// <exception cref="VfioUserProtocolException">Too short or long, JSON without NUL, not JSON, a wrong type, or out of a limit.</exception>
    internal static VfioUserVersion Parse(ReadOnlySpan<byte> payload)
    {
        if (payload.Length < HeadBytes) throw new VfioUserProtocolException($"VERSION: payload of {payload.Length} bytes, at least {HeadBytes} expected");
        if (payload.Length > VfioUserLimits.ControlBytes)
            throw new VfioUserProtocolException($"VERSION: payload of {payload.Length} bytes, at most {VfioUserLimits.ControlBytes} expected");
        var version = new VfioUserVersion
        {
            Major = BinaryPrimitives.ReadUInt16LittleEndian(payload), Minor = BinaryPrimitives.ReadUInt16LittleEndian(payload[2..]), HasJson = payload.Length > HeadBytes,
        };
        if (!version.HasJson) return version;
        if (payload[^1] != 0) throw new VfioUserProtocolException("VERSION: the JSON does not end with a NUL");
        try
        {
            using JsonDocument json = JsonDocument.Parse(payload[HeadBytes..^1].ToArray(), new JsonDocumentOptions { MaxDepth = VfioUserLimits.JsonDepth });
            JsonElement root = Object(json.RootElement, "the JSON");
            return root.TryGetProperty("capabilities", out JsonElement capabilities) ? version.With(Object(capabilities, "capabilities")) : version;
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException) // InvalidOperationException: a name with half a surrogate pair.
        {
            throw new VfioUserProtocolException($"VERSION: not JSON: {e.Message}", Errno.EINVAL, e);
        }
    }

    /// <summary>Makes a payload with all members that differ from their defaults.</summary>
    /// <param name="isFull">Name the limits that equal their defaults too.</param>
    /// <returns>Head, compact JSON, NUL.</returns>
    internal byte[] ToPayload(bool isFull = false)
    {
        var bytes = new ArrayBufferWriter<byte>(256);
        Span<byte> head = bytes.GetSpan(HeadBytes);
        BinaryPrimitives.WriteUInt16LittleEndian(head, Major);
        BinaryPrimitives.WriteUInt16LittleEndian(head[2..], Minor);
        bytes.Advance(HeadBytes);
        using (var json = new Utf8JsonWriter(bytes))
        {
            json.WriteStartObject();
            if (HasMembers || isFull) WriteCapabilities(json, isFull);
            json.WriteEndObject();
        }
        bytes.GetSpan(1)[0] = 0;
        bytes.Advance(1);
        return bytes.WrittenSpan.ToArray();
    }

    /// <summary>
    /// The answer to a request, never longer than it (vfio-user S-5: QEMU reads it into the request's buffer); offers are left out, the least
    /// important first, until it fits. The reply to a request without JSON may have any length and names every limit, as libvfio-user does.
    /// </summary>
    /// <param name="request">What the client sent.</param>
    /// <param name="requestPayloadBytes">Its length without header.</param>
    /// <returns>The payload; the minor is the lesser of both (vfio-user S-6), the twin socket is dropped unless asked for (vfio-user S-7).</returns>
    /// <exception cref="VfioUserProtocolException">The members that restrict the client do not fit.</exception>
    internal byte[] ToReply(VfioUserVersion request, int requestPayloadBytes)
    {
        VfioUserVersion reply = this with { Minor = Math.Min(request.Minor, Minor), TwinSocket = request.TwinSocket is { Supported: true } ? TwinSocket : null };
        if (!request.HasJson) return reply.ToPayload(isFull: true);
        int limit = requestPayloadBytes;
        byte[] payload = reply.ToPayload();
        // Only members that offer something may be left out; those that restrict the client (a smaller size, fewer maps) must stay.
        for (int drop = 0; payload.Length > limit; drop++)
        {
            reply = drop switch
            {
                0 => reply with { WriteMultiple = false },
                1 => reply.Migration is null ? reply : reply with { Migration = new VfioUserMigrationCapability(reply.Migration.PageSizeBytes) },
                2 => reply with { MaxDataXferBytes = Math.Min(reply.MaxDataXferBytes, VfioUserLimits.DataXferBytes) },
                3 => reply with { Migration = null },
                4 => reply with { MaxMsgFds = Math.Min(reply.MaxMsgFds, 1) },
                _ => throw new VfioUserProtocolException($"VERSION: a reply of {payload.Length} bytes does not fit into the request's {limit}"),
            };
            payload = reply.ToPayload();
        }
        return payload;
    }

    private bool HasMembers => MaxMsgFds != 1 || MaxDataXferBytes != VfioUserLimits.DataXferBytes || PageSizes != VfioUserLimits.PageBytes
        || MaxDmaMaps != VfioUserLimits.DmaMaps || Migration is not null || TwinSocket is not null || WriteMultiple;

    private void WriteCapabilities(Utf8JsonWriter json, bool isFull)
    {
        json.WriteStartObject("capabilities"u8);
        if (MaxMsgFds != 1 || isFull) json.WriteNumber("max_msg_fds"u8, MaxMsgFds);
        if (MaxDataXferBytes != VfioUserLimits.DataXferBytes || isFull) json.WriteNumber("max_data_xfer_size"u8, MaxDataXferBytes);
        if (PageSizes != VfioUserLimits.PageBytes || isFull) json.WriteNumber("pgsizes"u8, PageSizes);
        if (MaxDmaMaps != VfioUserLimits.DmaMaps || isFull) json.WriteNumber("max_dma_maps"u8, MaxDmaMaps);
        if (Migration is not null)
        {
            json.WriteStartObject("migration"u8);
            if (Migration.PageSizeBytes is ulong pageSize) json.WriteNumber("pgsize"u8, pageSize);
            if (Migration.MaxBitmapBytes != VfioUserLimits.BitmapBytes) json.WriteNumber("max_bitmap_size"u8, Migration.MaxBitmapBytes);
            json.WriteEndObject();
        }
        if (TwinSocket is not null)
        {
            json.WriteStartObject("twin_socket"u8);
            json.WriteBoolean("supported"u8, TwinSocket.Supported);
            if (TwinSocket.FdIndex is int index) json.WriteNumber("fd_index"u8, index);
            json.WriteEndObject();
        }
        if (WriteMultiple) json.WriteBoolean("write_multiple"u8, true);
        json.WriteEndObject();
    }

    private VfioUserVersion With(JsonElement capabilities)
    {
        VfioUserVersion v = this;
        foreach (JsonProperty member in capabilities.EnumerateObject())
        {
            v = member.Name switch
            {
                "max_msg_fds" => v with { MaxMsgFds = (int)Number(member, 0, VfioUserLimits.MaxMessageFds) },
                "max_data_xfer_size" => v with { MaxDataXferBytes = (int)Number(member, 1, VfioUserLimits.MaxDataXferBytes) },
                "pgsizes" => v with { PageSizes = PageMultiple(member, long.MaxValue) },
                "max_dma_maps" => v with { MaxDmaMaps = (int)Number(member, 1, VfioUserLimits.DmaMaps) },
                "migration" => v with { Migration = ParseMigration(Object(member.Value, member.Name)) },
                "twin_socket" => v with { TwinSocket = ParseTwin(Object(member.Value, member.Name)) },
                "write_multiple" => v with { WriteMultiple = Bool(member) },
                _ => v,
            };
        }
        return v;
    }

    private static VfioUserMigrationCapability ParseMigration(JsonElement json)
    {
        var capability = new VfioUserMigrationCapability(null);
        foreach (JsonProperty member in json.EnumerateObject())
        {
            if (member.Name == "pgsize") capability = capability with { PageSizeBytes = PageMultiple(member, 1 << 30) };
            if (member.Name == "max_bitmap_size") capability = capability with { MaxBitmapBytes = (ulong)Number(member, 0, (long)VfioUserLimits.BitmapBytes) };
        }
        return capability;
    }

    private static VfioUserTwinSocket ParseTwin(JsonElement json)
    {
        var twin = new VfioUserTwinSocket(false);
        foreach (JsonProperty member in json.EnumerateObject())
        {
            if (member.Name == "supported") twin = twin with { Supported = Bool(member) };
            if (member.Name == "fd_index") twin = twin with { FdIndex = (int)Number(member, 0, VfioUserLimits.MaxMessageFds) };
        }
        return twin;
    }

    private static JsonElement Object(JsonElement value, string what) => value.ValueKind == JsonValueKind.Object
        ? value : throw new VfioUserProtocolException($"VERSION: {what} is {value.ValueKind}, an object is expected");

    private static bool Bool(JsonProperty member) => member.Value.ValueKind is JsonValueKind.True or JsonValueKind.False
        ? member.Value.GetBoolean() : throw new VfioUserProtocolException($"VERSION: '{member.Name}' is {member.Value.ValueKind}, a boolean is expected");

    private static long Number(JsonProperty member, long min, long max) =>
        member.Value.ValueKind == JsonValueKind.Number && member.Value.TryGetInt64(out long n) && n >= min && n <= max
            ? n : throw new VfioUserProtocolException($"VERSION: '{member.Name}' is {member.Value}, a whole number from {min} to {max} is expected");

    private static ulong PageMultiple(JsonProperty member, long max)
    {
        long n = Number(member, VfioUserLimits.PageBytes, max);
        return n % VfioUserLimits.PageBytes == 0 ? (ulong)n : throw new VfioUserProtocolException($"VERSION: '{member.Name}' is {n}, a multiple of {VfioUserLimits.PageBytes} is expected");
    }
}
