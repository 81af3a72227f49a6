using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;

namespace Vmm.Tests.Support;

/// <summary>A move whose guest writes faster than it is sent, so that it goes on until it is allowed to end.</summary>
internal static class XbzrleMove
{
    internal static Task<MigrationStatus> Begin(TestVm source, string uri)
    {
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.Xbzrle, true)]);
        source.Engine.Parameters = source.Engine.Parameters with { DowntimeLimitMs = 0, MaxBandwidthBytesPerSecond = 16 << 20 };
        return source.Engine.Migrate(MigrationAddress.Parse(uri));
    }

    /// <summary>Lets the move end when pages have gone as deltas.</summary>
    internal static void FinishAfterDeltas(TestVm source)
    {
        LeakCheck.WaitFor(() => source.Engine.Query() is { Xbzrle.Pages: > 200 } or { Status: MigrationStatus.Failed }, "pages go as deltas");
        source.Engine.Parameters = source.Engine.Parameters with { DowntimeLimitMs = 1000, MaxBandwidthBytesPerSecond = 0 };
    }
}
