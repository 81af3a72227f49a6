namespace Vmm.Core.Devices;

/// <summary>A set of device types and services that a host adds with one call.</summary>
public interface IVmmPlugin
{
    /// <summary>Adds the plugin's factories and services. Called once, before the container is built.</summary>
    void Configure(VmmBuilder builder);
}
